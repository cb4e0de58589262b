"""A mock KV server: it listens and takes connections, nothing more. Arguments: HOST PORT."""

import socket
import sys

server = socket.create_server((sys.argv[1], int(sys.argv[2])))
while True:
    server.accept()
