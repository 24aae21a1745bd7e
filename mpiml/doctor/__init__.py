"""The doctor: whether a job is well placed on its machine."""
