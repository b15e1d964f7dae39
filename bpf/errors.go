package bpf

import "errors"

// Errors of the environment. An error that wraps ErrUnsupported also says what to do.
var (
	// ErrUnsupported: this node cannot run the programs.
	ErrUnsupported = errors.New("capture by cgroup is not possible on this node")
	// ErrNoOwner: the kernel has no record of the connection, or the cgroup in the record is no longer that of a pod.
	// There is no record if no process below the cgroup of all pods opened the connection, if the kernel kept no SYN of
	// it, or if later connections evicted the record from the map.
	ErrNoOwner = errors.New("the kernel has no record of the pod that opened this connection")
)
