"""The loss around θ: Fisher information, spectra, landscapes."""
