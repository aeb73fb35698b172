"""What answers behind the server: one small protocol, and the engines that implement it."""
