"""What a run will need before it runs: parameters, memory, time, network. Imports no torch, and asks for no GPU."""
