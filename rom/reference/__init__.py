"""What each operator means: plain torch, any dtype and device. The oracle of the tests and the last fallback."""
