package token

import (
	"os"
	"strings"
	"testing"

	"github.com/podidentity/podidentity/identity"
)

func TestTheClientSecretIsReadFromTheSecret(t *testing.T) {
	cases := []struct {
		name string
		data map[string][]byte
		want string
		flaw string
	}{
		{"under its key", map[string][]byte{"clientSecret": []byte("abc"), "other": []byte("x")}, "abc", ""},
		{"under the only key", map[string][]byte{"whatever": []byte("abc")}, "abc", ""},
		{"with line breaks at the end", map[string][]byte{"clientSecret": []byte("abc \r\n\n")}, "abc ", ""},
		{"nowhere", nil, "", "is empty"},
		{"under one of several", map[string][]byte{"a": []byte("abc"), "b": []byte("def")}, "", "several keys"},
		{"empty", map[string][]byte{"clientSecret": []byte("\n")}, "", "an empty client secret"},
		{"too long", map[string][]byte{"clientSecret": make([]byte, maxSecret+1)}, "", "more than 4 KiB"},
		{"not UTF-8", map[string][]byte{"clientSecret": []byte("ab\xff")}, "", "not text"},
		{"of two lines", map[string][]byte{"clientSecret": []byte("ab\ncd")}, "", "line breaks inside"},
	}
	for _, c := range cases {
		got, err := clientSecret(c.data)
		if got != c.want || (err == nil) != (c.flaw == "") {
			t.Errorf("%s: got %q, %v", c.name, got, err)
		}
		if err == nil {
			continue
		}
		failed := contentError(Ref{"ns", "name"}, err)
		if failed.Class != Denied || failed.Reason != identity.SecretInvalid || !strings.HasPrefix(failed.Detail, "Secret ns/name ") || !strings.Contains(failed.Detail, c.flaw) || !strings.Contains(failed.Detail, "; write the client secret") {
			t.Errorf("%s: got %+v", c.name, failed)
		}
	}
}

// staticTexts is the source code that contains the constant parts of the messages. If a value of a Secret also occurs
// in this source code, it can be in a message by chance, so checkReading does not report such a value.
var staticTexts = func() string {
	var all strings.Builder
	for _, name := range []string{"secret.go", "certificate.go", "pkcs12.go", "token.go"} {
		text, err := os.ReadFile(name)
		if err != nil {
			panic(err)
		}
		all.Write(text)
	}
	return all.String()
}()

func FuzzSecret(f *testing.F) {
	f.Add("clientSecret", []byte("a-client-secret"), "other", []byte("value"), false)
	f.Add("a", []byte("a-client-secret"), "b", []byte("another secret"), false)
	f.Add("certificate", join(ec256().certPEM(), ec256().keyPEM()), "password", []byte("pass\nword"), true)
	f.Add("certificate", []byte("-----BEGIN PRIVATE KEY-----\n"), "", []byte{}, true)
	f.Fuzz(func(t *testing.T, key1 string, value1 []byte, key2 string, value2 []byte, asCertificate bool) {
		data := map[string][]byte{}
		for key, value := range map[string][]byte{key1: value1, key2: value2} {
			if key != "" {
				data[key] = value
			}
		}
		if takesLong(data[certificateKey]) {
			return
		}
		checkReading(t, data, asCertificate)
	})
}
