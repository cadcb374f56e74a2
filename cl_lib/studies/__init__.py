"""Many runs described in one file."""
