package iptables

import "errors"

// Errors of the environment. The error that wraps one of them says what to do, or for ErrDrift what differs.
var (
	// ErrForeignChain: a chain with one of our names has rules, but none of them and no jump to the chain is ours. The
	// chain is not changed.
	ErrForeignChain = errors.New("a chain with a name that NMI uses belongs to another program")
	// ErrForeignLink: a link with our name, or our address on another link, belongs to another program.
	ErrForeignLink = errors.New("the link or the listen address of NMI belongs to another program")
	// ErrMissingBinary: the image does not have the iptables programs.
	ErrMissingBinary = errors.New("iptables programs are missing")
	// ErrMissingCapability: the process lacks a capability that it needs to read or change the rules.
	ErrMissingCapability = errors.New("a Linux capability is missing")
	// ErrDrift: the rules or the link differ from the expected state.
	ErrDrift = errors.New("the rules or the link of the capture differ from the expected state")
)
