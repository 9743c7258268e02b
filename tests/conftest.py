"""What all tests share: a shell's background jobs have Ctrl-C ignored and pass that on, so tests that send it set it right first."""

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
