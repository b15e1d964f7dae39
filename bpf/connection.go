package bpf

import (
	"encoding/binary"
	"fmt"
	"net"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxHeaders is the size in bytes of an IPv4 and a TCP header with all options.
const maxHeaders = 60 + 60

// The TCP option that record_connection writes: kind, length, 2 bytes that identify it (RFC 6994), and the token.
const (
	tokenKind       = 254
	tokenLength     = 12
	tokenExperiment = 0x5049
)

// tokenOf returns the token of an accepted connection. The kernel returns the SYN once.
func tokenOf(conn net.Conn) (token uint64, err error) {
	tcp, ok := conn.(syscall.Conn)
	if !ok {
		return 0, fmt.Errorf("%T is not a TCP connection", conn)
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return 0, err
	}
	var syn []byte
	var failed error
	if err := raw.Control(func(fd uintptr) { syn, failed = savedSYN(fd) }); err != nil {
		return 0, err
	}
	if failed != nil {
		return 0, fmt.Errorf("reading the SYN of a connection: %w", failed)
	}
	return parseToken(syn)
}

// savedSYN returns the headers of the SYN from the IPv4 header on. It is empty if the kernel used SYN cookies.
func savedSYN(fd uintptr) ([]byte, error) {
	syn := make([]byte, maxHeaders)
	size := uint32(len(syn))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.IPPROTO_TCP, unix.TCP_SAVED_SYN,
		uintptr(unsafe.Pointer(&syn[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return nil, errno
	}
	return syn[:size], nil
}

// parseToken returns the token in the headers of a SYN. The error is ErrNoOwner if there is none. A pod can send any SYN.
func parseToken(syn []byte) (uint64, error) {
	if len(syn) == 0 {
		return 0, fmt.Errorf("%w: the kernel kept no SYN, because it used SYN cookies against a flood of connections", ErrNoOwner)
	}
	for options := tcpOptions(syn); len(options) > 1; {
		kind, length := options[0], int(options[1])
		if kind == 1 { // padding of one byte
			options = options[1:]
			continue
		}
		if kind == 0 || length < 2 || length > len(options) {
			break
		}
		if kind == tokenKind && length == tokenLength && binary.BigEndian.Uint16(options[2:]) == tokenExperiment {
			return binary.NativeEndian.Uint64(options[4:]), nil
		}
		options = options[length:]
	}
	return 0, fmt.Errorf("%w: it was not opened by a socket below the cgroup of all pods", ErrNoOwner)
}

// tcpOptions returns the options in the TCP header behind an IPv4 header, or nil if the headers are not complete.
func tcpOptions(syn []byte) []byte {
	const fixed, dataOffset = 20, 12 // bytes of a TCP header without options; offset of its length
	tcp := syn[min(len(syn), int(syn[0]&0x0f)*4):]
	if syn[0]>>4 != 4 || len(tcp) < fixed {
		return nil
	}
	end := int(tcp[dataOffset]>>4) * 4
	if end < fixed || end > len(tcp) {
		return nil
	}
	return tcp[fixed:end]
}
