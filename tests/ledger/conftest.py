"""Property tests here execute and encrypt: no single example is held to a deadline on a busy machine."""

from hypothesis import settings

settings.register_profile("unhurried", deadline=None, print_blob=True)
settings.load_profile("unhurried")
