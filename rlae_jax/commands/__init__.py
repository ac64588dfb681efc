"""The commands, a file each: a function whose parameters are the options, which calls the library and prints."""
