"""Self-supervised learning on chest X-rays and their reports, driven by configuration files."""
