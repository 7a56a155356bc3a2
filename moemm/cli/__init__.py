"""The command line: `app` finds the verb, each other file is one verb."""
