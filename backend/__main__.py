"""``python -m backend`` is ``wsc-backend``."""

from backend.cli import main

if __name__ == "__main__":
    main()
