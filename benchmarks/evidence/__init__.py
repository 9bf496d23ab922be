"""Which masking rule helps? Training runs with known noise, measured with the library's own estimators and rules."""
