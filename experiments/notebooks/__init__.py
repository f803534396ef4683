"""Notebooks that open in Colab. They call the library and its programs and define nothing themselves."""
