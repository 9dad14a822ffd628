"""What is fast, and how we know: the measurements behind ``wsc-backend bench``. Each module measures one thing and asserts nothing."""
