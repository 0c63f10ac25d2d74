"""The two commands, duet-cache and duet-distill: parse, configure, call, print."""
