package bpf

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"
)

// syn returns the headers of a SYN with TCP options, which are padded with zeros.
func syn(options ...byte) []byte {
	for len(options)%4 != 0 {
		options = append(options, 0)
	}
	ip, tcp := make([]byte, 24), make([]byte, 20) // the IPv4 header has an option, too
	ip[0], tcp[12] = 0x46, byte((20+len(options))/4)<<4
	return slices.Concat(ip, tcp, options)
}

func TestTheTokenIsFoundAmongTheOptionsOfTheSYN(t *testing.T) {
	token := []byte{254, 12, 0x50, 0x49, 1, 2, 3, 4, 5, 6, 7, 8}
	mss, padding := []byte{2, 4, 5, 0xb4}, []byte{1, 1}
	with := func(options ...[]byte) []byte { return syn(slices.Concat(options...)...) }
	for name, c := range map[string]struct {
		syn   []byte
		found bool
	}{
		"alone":                     {with(token), true},
		"behind others":             {with(mss, padding, token), true},
		"none":                      {with(mss), false},
		"no options":                {syn(), false},
		"behind the end":            {with([]byte{0, 0, 0, 0}, token), false},
		"another experiment":        {with([]byte{254, 12, 0x50, 0x48, 1, 2, 3, 4, 5, 6, 7, 8}), false},
		"too short":                 {with([]byte{254, 4, 0x50, 0x49}), false},
		"an option of length 0":     {with([]byte{2, 0}, token), false},
		"an option beyond the end":  {with([]byte{2, 40}, token), false},
		"cut":                       {with(token)[:50], false},
		"SYN cookies":               {nil, false},
		"one byte":                  {[]byte{0x45}, false},
		"IPv6":                      {append([]byte{0x60}, make([]byte, 79)...), false},
		"options beyond the header": {append(syn()[:36], append([]byte{0xf0}, make([]byte, 7)...)...), false},
	} {
		got, err := parseToken(c.syn)
		switch {
		case c.found && (err != nil || got != binary.NativeEndian.Uint64(token[4:])):
			t.Errorf("%s: got %x, %v", name, got, err)
		case !c.found && !errors.Is(err, ErrNoOwner):
			t.Errorf("%s: got %x, %v; want ErrNoOwner", name, got, err)
		}
	}
}

// Pods with NET_RAW can send any SYN.
func FuzzToken(f *testing.F) {
	f.Add(syn(254, 12, 0x50, 0x49, 1, 2, 3, 4, 5, 6, 7, 8))
	f.Add(syn(2, 4, 5, 0xb4, 1, 1))
	f.Fuzz(func(t *testing.T, headers []byte) {
		if _, err := parseToken(headers); err != nil && !errors.Is(err, ErrNoOwner) {
			t.Errorf("%x: %v", headers, err)
		}
	})
}
