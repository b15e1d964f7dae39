package token

import (
	"encoding/base64"
	"encoding/json"
	"strings"
	"time"

	"github.com/podidentity/podidentity/internal/text"
)

// clockSkew is how far back Entra dates a token's beginning.
const clockSkew = 5 * time.Minute

// describe fills in what the token says about itself. It is not verified: it came from Azure over a connection we
// made, clients get it as it is, and what is read here only fills fields of the answer and finds an object_id among
// the identities the pod has anyway.
func describe(accessToken string, expiresOn, now time.Time) Token {
	t := Token{AccessToken: accessToken, ExpiresOn: expiresOn, NotBefore: now.Add(-clockSkew), Fetched: now}
	parts := strings.Split(accessToken, ".")
	if len(parts) != 3 {
		return t
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return t
	}
	var claims struct {
		NotBefore int64  `json:"nbf"`
		AppID     string `json:"appid"`
		ObjectID  string `json:"oid"`
		TokenID   string `json:"uti"`
	}
	if json.Unmarshal(payload, &claims) != nil {
		return t
	}
	if claims.NotBefore > 0 {
		t.NotBefore = time.Unix(claims.NotBefore, 0)
	}
	t.ClientID, t.ObjectID, t.ID = claims.AppID, claims.ObjectID, text.OneLine(claims.TokenID, maxErrorText)
	return t
}
