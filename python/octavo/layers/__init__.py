"""What models are made of, over one op set."""
