package iptables

import "errors"

// What can be wrong with the surroundings rather than with the rules. Each is wrapped in a sentence that says what to do.
var (
	// ErrForeignChain: a chain with one of our names holds rules that are not ours. It is left as it is.
	ErrForeignChain = errors.New("a chain with our name belongs to someone else")
	// ErrForeignLink: a link with our name, or our address on another link, belongs to someone else.
	ErrForeignLink = errors.New("the listen link or address belongs to someone else")
	// ErrMissingBinary: the image lacks the iptables programs.
	ErrMissingBinary = errors.New("iptables programs are missing")
	// ErrMissingCapability: the process may not change the node's network.
	ErrMissingCapability = errors.New("a Linux capability is missing")
	// ErrDrift: the rules or the link are not as they should be.
	ErrDrift = errors.New("capture is not as it should be")
)
