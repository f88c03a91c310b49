{{/*
The record of an API key as `isthmus keys add` writes it: HMAC-SHA-256 of the secret under a salt. There is no HMAC in
templates, so it is made of its two SHA-256. The salt is 16 letters out of 16, so that both pads are text; the inner
digest is made bytes again by way of base64, three hex digits at a time.
*/}}
{{- define "isthmus.keyHash" -}}
{{- $inner := dict "a" "W" "b" "T" "c" "U" "d" "R" "e" "S" "f" "P" "g" "Q" "h" "^" "i" "_" "j" "\\" "k" "]" "l" "Z" "m" "[" "n" "X" "o" "Y" "p" "F" -}}
{{- $outer := dict "a" "=" "b" ">" "c" "?" "d" "8" "e" "9" "f" ":" "g" ";" "h" "4" "i" "5" "j" "6" "k" "7" "l" "0" "m" "1" "n" "2" "o" "3" "p" "," -}}
{{- $innerPad := repeat 48 "6" -}}
{{- $outerPad := repeat 48 "\\" -}}
{{- $innerKey := "" -}}
{{- $outerKey := "" -}}
{{- range (splitList "" .salt) -}}
{{- $innerKey = printf "%s%s" $innerKey (index $inner .) -}}
{{- $outerKey = printf "%s%s" $outerKey (index $outer .) -}}
{{- end -}}
{{- $digest := printf "%s%s%s" $innerKey $innerPad .secret | sha256sum -}}
{{- $digits := "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/" -}}
{{- $hex := "0123456789abcdef" -}}
{{- $values := dict -}}
{{- range $value, $digit := splitList "" $hex -}}
{{- $_ := set $values $digit $value -}}
{{- end -}}
{{- $base64 := "" -}}
{{- $padded := printf "%s00" $digest -}}
{{- range $group := until 22 -}}
{{- $at := mul $group 3 | int -}}
{{- $number := add (mul (index $values (substr $at (add1 $at | int) $padded)) 256) (mul (index $values (substr (add $at 1 | int) (add $at 2 | int) $padded)) 16) (index $values (substr (add $at 2 | int) (add $at 3 | int) $padded)) -}}
{{- $high := div $number 64 | int -}}
{{- $low := mod $number 64 | int -}}
{{- $base64 = printf "%s%s%s" $base64 (substr $high (add1 $high | int) $digits) (substr $low (add1 $low | int) $digits) -}}
{{- end -}}
{{- $bytes := printf "%s=" (trunc 43 $base64) | b64dec -}}
{{- printf "%s%s%s" $outerKey $outerPad $bytes | sha256sum -}}
{{- end }}

{{- define "isthmus.keysFile" -}}
{{- $salt := "" -}}
{{- range until 16 -}}
{{- $salt = printf "%s%s" $salt (index (list "a" "b" "c" "d" "e" "f" "g" "h" "i" "j" "k" "l" "m" "n" "o" "p") (randInt 0 16)) -}}
{{- end -}}
{{- $record := dict "id" .id "tenant" "default" "name" "made by the chart" "salt" (printf "%x" $salt) "hash" (include "isthmus.keyHash" (dict "salt" $salt "secret" .secret)) "created" (now | date "2006-01-02T15:04:05Z07:00") -}}
{{- dict "version" 1 "keys" (list $record) | toPrettyJson -}}
{{- end }}
