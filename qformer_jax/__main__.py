"""`python -m qformer_jax` is the command `qformer`."""

from .cli import main

if __name__ == '__main__':
    main()
