"""The building blocks of models, over one op set."""
