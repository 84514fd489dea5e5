"""An image passes from its owner to a successor over a socket: server, client, messages, names of sockets."""
