"""Notebooks that open in Colab; they call the library and its programs and define nothing."""
