"""How an image comes to a process by its name, other than over a socket."""
