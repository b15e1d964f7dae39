package bpf

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const (
	linkPrefix = "link_"
	mapsPrefix = "maps_"
)

// mapDir returns the folder of the maps. Its name depends on their layout, so that programs never use a map of another
// layout that an earlier version pinned.
func mapDir(pins string, spec *ebpf.CollectionSpec) string {
	layout := fnv.New32a()
	for _, name := range slices.Sorted(maps.Keys(spec.Maps)) {
		m := spec.Maps[name]
		fmt.Fprintln(layout, name, m.Type, m.KeySize, m.ValueSize, m.MaxEntries, m.Flags)
	}
	return filepath.Join(pins, fmt.Sprintf("%s%08x", mapsPrefix, layout.Sum32()))
}

// load loads the programs, and pins their maps. It uses the pinned maps of an earlier installation if their layout is the
// same.
func (c *Capture) load() error {
	spec, err := loadPrograms()
	if err != nil {
		return err
	}
	for _, m := range spec.Maps {
		m.Pinning = ebpf.PinByName
	}
	dir := mapDir(c.PinDir, spec)
	c.mapDir = dir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("creating the folder of the maps: %w", err)
	}
	collection, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: dir}})
	if err != nil {
		return explainLoad(err)
	}
	old := c.loaded
	c.loaded = collection
	if err := writeTokenKey(collection.Maps[programsMapTokenKey]); err != nil {
		return err
	}
	c.connections.Store(collection.Maps[programsMapConnections])
	if old != nil {
		old.Close()
	}
	return nil
}

func writeTokenKey(tokenKey *ebpf.Map) error {
	key := make([]byte, tokenKey.ValueSize())
	_, _ = rand.Read(key) // it never fails
	if err := tokenKey.Put(uint32(0), key); err != nil {
		return fmt.Errorf("writing the key of the tokens: %w", err)
	}
	return nil
}

// missingMaps returns the names of the maps that are not pinned in dir any more.
func missingMaps(dir string, loaded map[string]*ebpf.Map) (names []string) {
	for name := range loaded {
		if _, err := os.Stat(filepath.Join(dir, name)); errors.Is(err, fs.ErrNotExist) {
			names = append(names, name)
		}
	}
	return names
}

// pinMaps pins the maps with the names in dir again.
func pinMaps(dir string, loaded map[string]*ebpf.Map, names []string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("creating the folder of the maps: %w", err)
	}
	for _, name := range names {
		unpinned, err := loaded[name].Clone() // the map itself considers itself pinned
		if err != nil {
			return err
		}
		err = unpinned.Pin(filepath.Join(dir, name))
		if err = errors.Join(err, unpinned.Close()); err != nil {
			return fmt.Errorf("pinning the map %s: %w", name, err)
		}
	}
	return nil
}

// removeLeftovers removes what earlier versions pinned and this version does not use: eBPF links of other hooks, and
// maps of another layout.
func (c *Capture) removeLeftovers() error {
	keep := map[string]bool{filepath.Base(c.mapDir): true}
	for _, h := range hooks() {
		keep[filepath.Base(linkPath(c.PinDir, h))] = true
	}
	entries, err := os.ReadDir(c.PinDir)
	if err != nil {
		return fmt.Errorf("listing links and maps: %w", err)
	}
	for _, entry := range entries {
		name := entry.Name()
		if keep[name] {
			continue
		}
		if hookName, isLink := strings.CutPrefix(name, linkPrefix); isLink {
			err = detach(c.PinDir, hook{name: hookName})
		} else {
			err = os.RemoveAll(filepath.Join(c.PinDir, name))
		}
		if err != nil {
			return fmt.Errorf("removing %s, which an earlier version pinned: %w", name, err)
		}
	}
	return nil
}

// endpointOf returns the address in the form of the programs: in network byte order.
func endpointOf(a netip.AddrPort) programsEndpoint {
	ip := a.Addr().Unmap().As4()
	port := binary.BigEndian.AppendUint16(nil, a.Port())
	return programsEndpoint{Ip: binary.NativeEndian.Uint32(ip[:]), Port: binary.NativeEndian.Uint16(port)}
}

// settings returns the settings of the programs. rootID is the ID of the cgroup of all pods.
func (c *Capture) settings(rootID uint64) programsCaptureSettings {
	s := programsCaptureSettings{Listener: endpointOf(c.Listen), Metadata: endpointOf(c.Metadata), Root: rootID, HostNetns: c.netns}
	if c.CaptureHostNetwork {
		s.CaptureHost = 1
	}
	return s
}

func (c *Capture) settingsDiffer(rootID uint64) (bool, error) {
	var current programsCaptureSettings
	err := c.loaded.Maps[programsMapSettings].Lookup(uint32(0), &current)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return true, nil
	}
	return current != c.settings(rootID), err
}

func (c *Capture) writeSettings(rootID uint64) error {
	if err := c.loaded.Maps[programsMapSettings].Put(uint32(0), c.settings(rootID)); err != nil {
		return fmt.Errorf("writing the settings of the programs: %w", err)
	}
	return nil
}

// SetExemptPods sets which pods in the host network reach the metadata service itself although CaptureHostNetwork is
// set, by the UID that their cgroup has. It has no effect on other pods. A pod whose cgroup does not exist yet becomes
// exempt at the first SetExemptPods or Sync after its cgroup appears.
func (c *Capture) SetExemptPods(ctx context.Context, uids []string) error {
	release, err := c.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	c.exempt = map[string]bool{c.OwnPodUID: true}
	for _, uid := range uids {
		c.exempt[uid] = true
	}
	if c.loaded == nil {
		return nil
	}
	return c.writeExemptPods()
}

func (c *Capture) exemptPodsDiffer() (bool, error) {
	current, err := c.readExemptPods()
	return !maps.Equal(current, c.writtenExempt), err
}

func (c *Capture) readExemptPods() (map[uint64]bool, error) {
	current := map[uint64]bool{}
	var id uint64
	var unused uint8
	entries := c.loaded.Maps[programsMapExemptPods].Iterate()
	for entries.Next(&id, &unused) {
		current[id] = true
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("reading the exempt pods: %w", err)
	}
	return current, nil
}

func (c *Capture) writeExemptPods() error {
	current, err := c.readExemptPods()
	if err != nil {
		return err
	}
	uids := c.exempt
	if uids == nil { // keep those of an earlier NMI until this NMI knows the pods
		uids = map[string]bool{c.OwnPodUID: true}
	}
	expected, err := c.pods.ids(uids)
	if err != nil {
		return err
	}
	if c.exempt == nil {
		maps.Copy(expected, current)
	}
	exempt := c.loaded.Maps[programsMapExemptPods]
	for id := range current {
		if expected[id] {
			continue
		}
		if err := exempt.Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("capturing a pod that was exempt: %w", err)
		}
	}
	for id := range expected {
		if err := exempt.Put(id, uint8(1)); err != nil {
			return fmt.Errorf("exempting a pod (of %d): %w", len(expected), err)
		}
	}
	c.writtenExempt = expected
	return nil
}

// admitOlderHostSockets lets the connections to the metadata service go on that processes in the node's network namespace
// opened before the installation. There is no mark on their sockets.
func (c *Capture) admitOlderHostSockets() error {
	admitted := c.loaded.Maps[programsMapOlderHostSockets]
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} { // with IPv4-mapped addresses
		sockets, err := netlink.SocketDiagTCP(family)
		if err != nil {
			return fmt.Errorf("listing the connections of the node: %w", err)
		}
		for _, s := range sockets {
			destination, _ := netip.AddrFromSlice(s.ID.Destination)
			if destination.Unmap() != c.Metadata.Addr() {
				continue
			}
			cookie := uint64(s.ID.Cookie[1])<<32 | uint64(s.ID.Cookie[0])
			err := admitted.Put(cookie, uint8(1))
			if errors.Is(err, unix.E2BIG) {
				c.Logger.Warn("processes in the network of the node have more connections to the metadata service than the capture by cgroup can remember; it cuts off the rest, and new connections work",
					zap.Uint32("remembered", admitted.MaxEntries()))
				return nil
			}
			if err != nil {
				return fmt.Errorf("admitting a connection of the node: %w", err)
			}
		}
	}
	return nil
}

// maxRecordAge is well above the time between the SYN-ACK and the call of Owner. The record of a connection that NMI never
// accepted stays until other records need its place.
const maxRecordAge = time.Minute

// Owner returns the pod that opened the connection. Call it once for each connection that a listener on Config.Listen
// accepts. The listener must have the socket option TCP_SAVE_SYN. The error is ErrNoOwner if the kernel has no record of the
// connection, or the pod has ended.
func (c *Capture) Owner(conn net.Conn) (Owner, error) {
	connections := c.connections.Load()
	if connections == nil {
		return Owner{}, fmt.Errorf("%w: the capture by cgroup is not installed", ErrNoOwner)
	}
	token, err := tokenOf(conn)
	if err != nil {
		return Owner{}, err
	}
	var record programsConnectionRecord
	if err := connections.LookupAndDelete(token, &record); err != nil {
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return Owner{}, ErrNoOwner
		}
		return Owner{}, fmt.Errorf("reading the owner of a connection: %w", err)
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return Owner{}, fmt.Errorf("comparing the time of a connection: %w", err)
	}
	if age := time.Duration(now.Nano() - int64(record.Established)); age > maxRecordAge {
		return Owner{}, fmt.Errorf("%w: its record is %s old", ErrNoOwner, age.Round(time.Second))
	}
	return c.pods.owner(record.Owner.Cgroups)
}
