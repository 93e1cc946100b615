"""`python -m sophia_train`."""

from sophia_train.train import main

if __name__ == "__main__":
    main()
