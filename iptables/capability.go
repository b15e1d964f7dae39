package iptables

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// effectiveCapabilities is the set of the calling thread. A container runtime gives all threads the same.
func effectiveCapabilities() (uint64, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return 0, fmt.Errorf("reading the capabilities of this process: %w", err)
	}
	return uint64(data[1].Effective)<<32 | uint64(data[0].Effective), nil
}

func has(capabilities uint64, capability int) bool {
	return capabilities&(1<<uint(capability)) != 0
}

// requireAdmin fails before anything is touched, so that a node server without the right stops with a sentence an
// operator can act on rather than halfway through an installation.
func requireAdmin(capabilities uint64) error {
	if has(capabilities, unix.CAP_NET_ADMIN) {
		return nil
	}
	return fmt.Errorf("%w: changing netfilter rules needs CAP_NET_ADMIN; add NET_ADMIN to securityContext.capabilities.add of the container and run it as root", ErrMissingCapability)
}

// requireRaw is about the legacy back end only: its rules are read and written through a raw socket.
func requireRaw(capabilities uint64) error {
	if has(capabilities, unix.CAP_NET_RAW) {
		return nil
	}
	return fmt.Errorf("%w: the legacy iptables back end needs CAP_NET_RAW; add NET_RAW to securityContext.capabilities.add of the container, or choose the nft back end if the node uses that", ErrMissingCapability)
}
