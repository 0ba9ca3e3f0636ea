"""Raw sockets: a wire of its own (tcp), and the frames' stream of every data plane whose payloads go another way."""
