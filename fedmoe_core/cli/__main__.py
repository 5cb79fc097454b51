"""``python -m fedmoe_core.cli`` is the ``fedmoe`` command."""

from fedmoe_core.cli.main import main

if __name__ == "__main__":
    main()
