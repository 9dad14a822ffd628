"""What the commands of ``wsc-backend`` do; :mod:`backend.cli` only reads their arguments."""
