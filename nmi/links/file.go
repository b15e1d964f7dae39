package links

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

// FileName is the name of the file with the remembered table.
const FileName = "links.json"

// maxFileSize bounds the file. A node has a few hundred links, with about 150 bytes each.
const maxFileSize = 4 << 20

// savedTable is the content of the file: the table for the NMI that starts next.
type savedTable struct {
	Boot    string        `json:"boot"`    // ID of the boot; after another boot nothing is known
	Current time.Duration `json:"current"` // all links that existed at this time are in the table (time since boot)
	Links   []memoryLink  `json:"links"`
}

type memoryLink struct {
	key
	Kind      string       `json:"kind"`
	Created   creation     `json:"created"`
	Addresses []netip.Addr `json:"addresses,omitempty"`
}

// readMemory reads the file. Only root can write it, but a crash may leave anything, so the content is checked like input.
func readMemory(file, boot string, now time.Duration) (*savedTable, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFileSize+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxFileSize {
		return nil, fmt.Errorf("%s has more than %d bytes", file, maxFileSize)
	}
	var m savedTable
	if err := json.Unmarshal(text, &m); err != nil {
		return nil, fmt.Errorf("reading %s: %w", file, err)
	}
	if m.Boot != boot {
		return nil, fmt.Errorf("%s is of another boot of the node", file)
	}
	if m.Current < 0 || m.Current > now {
		return nil, fmt.Errorf("%s has a time that has not been yet", file)
	}
	for _, l := range m.Links {
		if l.Created.From < 0 || l.Created.To < l.Created.From || l.Created.To > now || len(l.Addresses) > maxAddresses {
			return nil, fmt.Errorf("%s has impossible values for link %q", file, l.Name)
		}
	}
	return &m, nil
}

// restore adds a link and its records if an earlier NMI knew the link.
func (t *Table) restore(e linkEvent, m *savedTable) {
	for _, known := range m.Links {
		if known.key != e.key || known.Kind != e.kind {
			continue
		}
		l := t.add(e, known.Created)
		for _, address := range known.Addresses {
			if _, ok := t.records[address]; !ok {
				t.records[address] = &record{link: l}
				l.addresses++
			}
		}
		return
	}
}

// snapshot returns the table as it is to be remembered. The caller holds t.mu.
func (t *Table) snapshot(boot string) savedTable {
	m := savedTable{Boot: boot, Current: t.current, Links: make([]memoryLink, 0, len(t.links))}
	addresses := make(map[*link][]netip.Addr, len(t.records))
	for address, rec := range t.records {
		addresses[rec.link] = append(addresses[rec.link], address)
	}
	for _, l := range t.links {
		m.Links = append(m.Links, memoryLink{key: l.key, Kind: l.kind, Created: l.created, Addresses: addresses[l]})
	}
	return m
}

// save replaces the file at once: a crash leaves the old or the new content.
func (m savedTable) save(file string) error {
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(file), FileName+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails if the file was renamed
	if _, err := f.Write(text); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}
