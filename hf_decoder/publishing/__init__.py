"""Uploads an examined model, and proves that it arrived."""
