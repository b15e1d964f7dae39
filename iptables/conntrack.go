package iptables

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/podidentity/podidentity/internal/nodelink"
)

// conntrack deletes connections to the metadata service from the kernel's connection tracking table, so that their next
// packet is matched against the rules again. The table can have a million entries; it is read as a stream, and only the
// entries to delete are kept in memory.
type conntrack struct {
	metadata netip.AddrPort
	listen   netip.AddrPort
}

// flow is one tracked TCP connection: its source, its original destination, and the server that replies. Destination
// and server differ if the connection was redirected.
type flow struct {
	source, destination, server netip.AddrPort
}

// deleteUncaptured deletes connections to the metadata service that are not redirected to the current listen address:
// they were not captured, or they were redirected to an earlier listen address or by another program. Connections of
// the node itself stay.
func (c conntrack) deleteUncaptured(ctx context.Context) (int, error) {
	addresses, err := nodelink.RetryInterrupted(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return 0, fmt.Errorf("listing the addresses of the node: %w", err)
	}
	node := map[netip.Addr]bool{}
	for _, a := range addresses {
		ip, _ := netip.AddrFromSlice(a.IP.To4())
		node[ip] = true
	}
	return deleteFlows(ctx, func(f flow) bool {
		return f.destination == c.metadata && f.server != c.listen && !node[f.source.Addr()]
	})
}

// deleteCaptured deletes connections to the metadata service that were redirected, to any address.
func (c conntrack) deleteCaptured(ctx context.Context) (int, error) {
	return deleteFlows(ctx, func(f flow) bool { return f.destination == c.metadata && f.server != c.metadata })
}

func deleteFlows(ctx context.Context, match func(flow) bool) (deleted int, err error) {
	keys, err := nodelink.RetryInterrupted(func() (keys [][]byte, err error) {
		err = request(nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP, nil, func(message []byte) bool {
			if f, key, ok := parseFlow(message); ok && match(f) {
				keys = append(keys, key)
			}
			return ctx.Err() == nil
		})
		return keys, err
	})
	// If all dumps were interrupted, delete the entries that the last one contained, and return the error too.
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return 0, fmt.Errorf("reading tracked connections: %w", err)
	}
	failed := []error{err, ctx.Err()}
	for _, key := range keys {
		switch err := request(nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK, key, nil); {
		case err == nil:
			deleted++
		case !errors.Is(err, unix.ENOENT): // ENOENT: the connection ended before.
			failed = append(failed, fmt.Errorf("deleting a tracked connection: %w", err))
		}
	}
	return deleted, errors.Join(failed...)
}

func request(operation, flags int, payload []byte, each func([]byte) bool) error {
	r := nl.NewNetlinkRequest(netlink.ConntrackTable<<8|operation, flags)
	r.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_INET, Version: nl.NFNETLINK_V0})
	if payload != nil {
		r.AddRawData(payload)
	}
	if each == nil {
		each = func([]byte) bool { return true }
	}
	return r.ExecuteIter(unix.NETLINK_NETFILTER, 0, each)
}

// attributeType is the mask that selects the type of a netlink attribute without its flags.
const attributeType = 0x3fff

// parseFlow parses one message of the kernel. ok is false if the connection is not TCP over IPv4. key identifies the
// connection for deletion: its original tuple, its zone and its ID. Without the ID, a newer connection with the same
// tuple could be deleted.
func parseFlow(message []byte) (f flow, key []byte, ok bool) {
	if len(message) < nl.SizeofNfgenmsg {
		return flow{}, nil, false
	}
	attributes, err := nl.ParseRouteAttr(message[nl.SizeofNfgenmsg:])
	if err != nil {
		return flow{}, nil, false
	}
	var original, reply bool
	for _, a := range attributes {
		switch a.Attr.Type & attributeType {
		case nl.CTA_TUPLE_ORIG:
			f.source, f.destination, original = parseTuple(a.Value)
		case nl.CTA_TUPLE_REPLY:
			f.server, _, reply = parseTuple(a.Value)
			continue
		case nl.CTA_ZONE, nl.CTA_ID:
		default:
			continue
		}
		key = append(key, (&nl.RtAttr{RtAttr: unix.RtAttr{Type: a.Attr.Type}, Data: a.Value}).Serialize()...)
	}
	return f, key, original && reply
}

func parseTuple(tuple []byte) (source, destination netip.AddrPort, ok bool) {
	var ips [2]netip.Addr
	var ports [2]uint16
	var tcp bool
	parts, err := nl.ParseRouteAttr(tuple)
	if err != nil {
		return source, destination, false
	}
	for _, part := range parts {
		values, err := nl.ParseRouteAttr(part.Value)
		if err != nil {
			return source, destination, false
		}
		for _, v := range values {
			kind := v.Attr.Type & attributeType
			switch part.Attr.Type & attributeType {
			case nl.CTA_TUPLE_IP:
				if ip, isIP := netip.AddrFromSlice(v.Value); isIP && (kind == nl.CTA_IP_V4_SRC || kind == nl.CTA_IP_V4_DST) {
					ips[kind-nl.CTA_IP_V4_SRC] = ip
				}
			case nl.CTA_TUPLE_PROTO:
				switch {
				case kind == nl.CTA_PROTO_NUM && len(v.Value) == 1:
					tcp = v.Value[0] == unix.IPPROTO_TCP
				case (kind == nl.CTA_PROTO_SRC_PORT || kind == nl.CTA_PROTO_DST_PORT) && len(v.Value) == 2:
					ports[kind-nl.CTA_PROTO_SRC_PORT] = binary.BigEndian.Uint16(v.Value)
				}
			}
		}
	}
	return netip.AddrPortFrom(ips[0], ports[0]), netip.AddrPortFrom(ips[1], ports[1]), tcp && ips[0].Is4() && ips[1].Is4()
}
