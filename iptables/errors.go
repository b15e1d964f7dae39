package iptables

import "errors"

// Errors of the environment. The error that wraps one of them says what to do, or for ErrDrift what differs.
var (
	// ErrForeignChain: a chain has a name that NMI uses, but it belongs to another program: the chain has rules, none
	// of them has NMI's comment, and no jump to the chain has NMI's comment. NMI does not change the chain.
	ErrForeignChain = errors.New("a chain with a name that NMI uses belongs to another program")
	// ErrMissingBinary: the image lacks the iptables programs of the configured back end, or of both back ends.
	ErrMissingBinary = errors.New("iptables programs are missing")
	// ErrMissingCapability: the process lacks a capability that it needs to read or change the rules.
	ErrMissingCapability = errors.New("a Linux capability is missing")
	// ErrDrift: the rules or the link differ from the expected state.
	ErrDrift = errors.New("the rules or the link of the capture differ from the expected state")
)
