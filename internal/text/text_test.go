package text

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestTruncateKeepsWholeCharactersAndTheLimit(t *testing.T) {
	for _, c := range []struct {
		s    string
		max  int
		want string
	}{
		{"", 0, ""}, {"abc", 3, "abc"}, {"abcd", 3, "…"}, {"abcdefg", 6, "abc…"}, {"abc defg", 7, "abc…"},
		{"ééé", 6, "ééé"}, {"ééé", 5, "é…"}, {"éééé", 6, "é…"}, {"abc", 2, ""}, {"a\xffbcdef", 6, "ab…"},
	} {
		if got := Truncate(c.s, c.max); got != c.want {
			t.Errorf("Truncate(%q, %d) = %q, want %q", c.s, c.max, got, c.want)
		}
	}
}

func TestOneLineReturnsOneLineOfValidText(t *testing.T) {
	for in, want := range map[string]string{" a\r\n\tb\x1b[2J ": "a b [2J", "\xff\xfe": "\uFFFD\uFFFD", "a\u2028b": "a b"} {
		if got := OneLine(in, 64); got != want {
			t.Errorf("OneLine(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzOneLine(f *testing.F) {
	f.Add("a\n\xffb…", 4)
	f.Fuzz(func(t *testing.T, s string, limit int) {
		limit &= 0xff
		got := OneLine(s, limit)
		if len(got) > limit || !utf8.ValidString(got) || strings.ContainsAny(got, "\r\n\x1b") {
			t.Errorf("OneLine(%q, %d) = %q", s, limit, got)
		}
	})
}
