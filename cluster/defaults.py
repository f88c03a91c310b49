"""Defaults that settings and commands share. Without imports: `isthmus --help` reads them."""

# Where a gateway listens and its clients look for it.
HOST = "127.0.0.1"
PORT = 50051
SERVER = f"{HOST}:{PORT}"
# Where it takes orders and tells its status.
ADMIN_PORT = 50052
ADMIN = f"{HOST}:{ADMIN_PORT}"
HTTP_PORT = 8000  # of `isthmus up`, where HTTP is answered
SUPERVISOR = f"{HOST}:50053"  # where a supervisor listens that is a process apart

DRAIN_S = 30.0  # for running requests, where a worker is drained or a cluster stops
