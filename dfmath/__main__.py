"""``python -m dfmath``."""

from dfmath.cli import main

if __name__ == "__main__":
    main()
