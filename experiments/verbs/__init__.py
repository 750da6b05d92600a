"""The verbs of the command line, a module a group; heavy imports happen inside the verbs."""
