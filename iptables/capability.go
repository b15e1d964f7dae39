package iptables

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// effectiveCapabilities returns the effective capabilities of the calling thread, one bit each. All threads of NMI have
// the same capabilities, because NMI never changes them.
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

// requireAdmin returns an error if CAP_NET_ADMIN is missing. The error says what to do. New calls requireAdmin, so that
// NMI without the capability stops before the first change and not in the middle of an installation.
func requireAdmin(capabilities uint64) error {
	if has(capabilities, unix.CAP_NET_ADMIN) {
		return nil
	}
	return fmt.Errorf("%w: changing netfilter rules requires CAP_NET_ADMIN; add NET_ADMIN to securityContext.capabilities.add of the container and run it as root", ErrMissingCapability)
}

// requireRaw returns an error if CAP_NET_RAW is missing. The error says what to do. The legacy back end reads and
// writes rules through a raw socket, which requires this capability.
func requireRaw(capabilities uint64) error {
	if has(capabilities, unix.CAP_NET_RAW) {
		return nil
	}
	return fmt.Errorf("%w: reading or changing legacy iptables rules requires CAP_NET_RAW; add NET_RAW to securityContext.capabilities.add of the container, or set --iptables-backend=nft if the other programs on the node use nft", ErrMissingCapability)
}
