"""The HTTP application: authentication, errors, metrics, pictures."""
