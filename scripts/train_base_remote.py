"""What torchrun runs for the stage of base (pretraining); see `nanochat.training.main`."""

from nanochat.training.process import tune_process

tune_process()  # before torch is loaded

from nanochat.training.main import main  # noqa: E402

if __name__ == "__main__":
    main()
