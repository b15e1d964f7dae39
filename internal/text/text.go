// Package text makes texts from outside (Azure, clients, Kubernetes objects) fit for log lines, Events and error
// messages. It protects their readers against texts of unlimited length, forged lines, terminal control sequences and
// bytes that are not UTF-8, which the API server and some log collectors refuse.
package text

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

const ellipsis = "…"

// Truncate returns s if it has at most maxBytes bytes. Otherwise it returns the beginning of s, in whole characters,
// followed by an ellipsis: together at most maxBytes bytes. If the ellipsis alone is too long, it returns "".
func Truncate(s string, maxBytes int) string {
	if len(s) <= maxBytes {
		return s
	}
	if maxBytes < len(ellipsis) {
		return ""
	}
	end := maxBytes - len(ellipsis)
	for end > 0 && !utf8.RuneStart(s[end]) {
		end--
	}
	return strings.TrimRight(strings.ToValidUTF8(s[:end], ""), " ") + ellipsis
}

// OneLine returns s as one line of valid UTF-8: each run of white space and control characters becomes one space, or
// nothing at the beginning and the end of s. The result is truncated to maxBytes bytes, see Truncate.
func OneLine(s string, maxBytes int) string {
	s = strings.Map(func(r rune) rune { // Map also replaces bytes that are not UTF-8 by U+FFFD
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s)
	return Truncate(strings.Join(strings.Fields(s), " "), maxBytes)
}
