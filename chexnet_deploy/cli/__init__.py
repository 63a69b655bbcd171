"""The command line: parse, call one package, print."""
