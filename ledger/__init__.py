"""Signed transactions in, ordered events out. Knows no models and no sockets."""
