"""Claims and the commands that back them. Each writes results/NAME.json; `make results` prints them all."""
