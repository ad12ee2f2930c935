"""Uploads a model that was examined, and proves that it arrived."""
