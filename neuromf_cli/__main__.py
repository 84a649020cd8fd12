"""`python -m neuromf_cli`, for machines where the `neuromf` script is not on the path."""

from neuromf_cli.app import main

if __name__ == "__main__":
    main()
