"""Nasty texts for tokenizers, by kind; whatever writes or reads the goldens takes them from here."""

import random

NASTY: dict[str, list[str]] = {
    "plain": [
        "",
        "a",
        "Hello world",
        "The quick brown fox jumps over the lazy dog.",
        "It's we're I'm you'd they'll don't he's I've",
        "IT'S WE'RE I'M YOU'D THEY'LL DON'T HE'S I'VE",
        "It'S We'rE i'M yOU'd they'Ll dON'T 'sabc 'tis ''s '' ' '",
        "camelCase PascalCase SCREAMING_CASE snake_case XMLHttpRequest iPhone ABCdefGHIjkl aB Ab",
        "Rock 'n' roll, o'clock; the 1990s' best... wasn't it?! Yes -- no --- (maybe) [sic] {ok} <tag/>",
        "mid-word hyphen-ation, co-operate; semi;colon:colon,comma.period",
        "ﬁne ﬂuﬀy ŒUVRE Straße STRASSE ǅ ǆ İstanbul ısı ſtop Kelvin K Ångström Å Ω Ω",
    ],
    "spaces": [
        " ",
        "  ",
        "   ",
        "\t",
        "\n",
        "\n\n",
        "\n\n\n\n\n",
        "\r\n",
        "\r\n\r\n",
        " \n \n ",
        "a ",
        " a",
        "  a  ",
        "a  b   c    d     e",
        "\ta\t\tb\t\t\tc",
        "a\nb\n\nc\n\n\nd",
        "a \n b\t\n\tc \r\n d",
        "word" + " " * 40 + "word",
        " " * 70,
        "x" + "\n" * 35 + "y",
        "end of line   \n   start of line",
        "nbsp\u00a0here\u00a0\u00a0two\u2003em\u2009thin\u3000wide\u202fnarrow\u1680ogham\u2028line\u2029para\x85next",
        "vertical\x0btab form\x0cfeed \x1c\x1d\x1e\x1f separators",
        "(   )  ,  .  !  ?  ;  :",
        "trailing newline\n",
        "trailing spaces   ",
        "!\n\n?\r\n.\n",
        "a\u00a0\n b\u3000\n",
    ],
    "numbers": [
        "0",
        "12",
        "123",
        "1234",
        "12345",
        "123456",
        "1234567",
        "12345678901234567890",
        "1,234,567.89 $12.50 €3,00 100% 3.14159 -42 +7 1e10 0x1F 0b101 1/2 10:30 2024-01-31",
        "a1 1a a12b345c6789 v1.2.3 x86_64 H2O COVID-19 3D 2nd 21st",
        "٠١٢٣٤٥ ०१२३ １２３４５６ ⅷ ½ ² ₃ ① 〇一二三 12３4５6",
        "1 2 3  4   5\n6\n\n7",
        "007 0000 1000000 999999999999",
        "12345abc67890",
        "5 000 000",
    ],
    "scripts": [
        "日本語のテキストです。これはテストです！",
        "中文文本，没有空格。你好世界！繁體中文「引號」",
        "한국어 텍스트입니다. 안녕하세요?",
        "ภาษาไทยไม่มีช่องว่าง สวัสดีครับ",
        "עברית מימין לשמאל, שָׁלוֹם עוֹלָם",
        "العربية من اليمين إلى اليسار، مَرْحَبًا بِالعَالَم ٢٠٢٤",
        "हिन्दी में पाठ क्षत्रिय, বাংলা লেখা, தமிழ் உரை",
        "Русский текст ПРОПИСНЫЕ строчные, Ελληνικά ΚΕΦΑΛΑΙΑ τόνος, Հայերեն, ქართული",
        "Tiếng Việt có dấu: ắ ằ ẳ ẵ ặ; Türkçe: ğüşıöç İ",
        "mixed日本語and English混在テキスト123数字",
        "ㄅㄆㄇ ㄱㄴㄷ ｶﾀｶﾅ ﾊﾝｶｸ Ｆｕｌｌｗｉｄｔｈ！",
        "ខ្មែរ ລາວ မြန်မာ ꦗꦮ አማርኛ ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ",
        "𠀀𠀁𪚥 㐀㐁 豈更 丽 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 𐐀𐐁 𞤀𞤁",
    ],
    "marks": [
        "é e\u0301 ñ n\u0303 ü u\u0308",
        "Z\u0351\u036b\u0343a\u0323\u0329l\u0348\u0323g\u0332o\u0349",
        "\u0301leading mark",
        " \u0301 space mark  \u0308\u0308",
        "A\u030a\u0301 o\u0328\u0304 क\u094d\u0937 ไ\u0e49\u0e49",
        "1\u0301 2\u20e3 !\u0301 \n\u0301",
    ],
    "emoji": [
        "😀 😃😄 🎉!",
        "👨‍👩‍👧‍👦 👩🏽‍💻 🏳️‍🌈 🇩🇪🇫🇷 1️⃣ ❤️ ☺ ™ ©",
        "text😀text 😀text text😀 😀😀😀😀😀",
        "🫠🫨🪿 🧑‍🚀",
        "→ ← ⇒ ∑ ∫ √ ∞ ≠ ≤ ± × ÷ ° § ¶ † • … ‰ № ℃ ¥ £ ¢ ₹ ₿",
    ],
    "controls": [
        "\x00",
        "a\x00b",
        "\x00\x00\x00",
        "\x01\x02\x07\x08\x1b[31mred\x1b[0m\x7f",
        "zero\u200bwidth\u200cnon\u200djoiner\u2060word\ufeffbom",
        "\ufeffbom first",
        "\u202eright to left override\u202c \u2066isolate\u2069",
        "\ufffd replacement \ufffe \uffff \U0010ffff \U000e0041",
        "\ue000 private \uf8ff \U000f0000 \U00100000",
        "soft\u00adhyphen \u034f\u180e\u2800 \u3164",
        "\u0378 unassigned \U0001ffff \u2ff0\u2ffe \U00031350 \U0002ebf0",
    ],
    "code": [
        "def f(x):\n    return x**2 + 1\n\n\nclass A(B):\n    pass\n",
        "for (int i = 0; i < 10; ++i) { a[i] = b[i]->c; }\n\t\tif (x != y && !z || w) return;\n",
        "<html><body class='x' id=\"y\">&nbsp;&#169;</body></html>",
        '{"key": [1, 2.5, true, null], "nested": {"a": "b\\n"}}',
        "SELECT * FROM t WHERE a='b''c' AND d<>3; -- comment",
        "https://example.com/a/b?c=d&e=%20f#g user@mail.org ../rel/path C:\\dir\\file.txt",
        "$x = `cmd` | grep -v '^#' > /dev/null 2>&1 # comment",
        "//comment /*block*/ ## heading ***bold*** ~~strike~~ ==== ---- ....",
        "a=b;c+=d;e==f;g=>h;i<-j;k|>l;m::n;o??p;q?.r;@s;&t;*u;!v;~w;^x;%y;\\z",
        "\\frac{1}{2} \\alpha_{i}^{2} $$x^2$$",
        "/\n//\n///\r\n/a/b\n",
    ],
    "special": [
        "<s>",
        "</s>",
        "<s>hello</s>",
        "<unk>",
        "<|endoftext|>",
        "<|im_start|>user\nHi<|im_end|>\n",
        "<|im_start|> <|im_end|>  <|im_end|>",
        "<|im_start|",
        "|im_start|>",
        "<|im_start|><|im_start|>",
        "< |im_start|> <|im_start |>",
        "<tool>call</tool> <tool><tool>",
        "a<tool>b <tool> c",
        "<too <tool <tool>> <<tool>>",
        "[CLS] [SEP] [MASK] [UNK] [PAD] [cls]",
        "text [MASK] text[MASK]text",
        "<0x41> <0x0A> <0xFF> <0x-1> <0xZZ>",
        "▁ ▁▁ a▁b ▁a",
        "<mask> a <mask>  b<mask>",
        "<sentinel:12> IMGIMGABZ IMGIMGABCDEZ IMGIMGZ <sentinel:>",
        "<extra_id_0> <extra_id_1>x <extra_id_ <e",
        "longer<tool_box> and <tool_box",
        "####special#### ## #### ###",
    ],
}


def corpus() -> list[str]:
    """Every nasty text, and 200 random mixtures of their characters and words (the same ones every time)."""
    texts = [text for group in NASTY.values() for text in group]
    shuffle = random.Random(20261121)
    characters = sorted(set("".join(texts)))
    words = sorted({word for text in texts for word in text.split(" ") if word})
    for _ in range(200):
        parts = []
        for _ in range(shuffle.randint(1, 12)):
            kind = shuffle.random()
            if kind < 0.4:
                parts.append(shuffle.choice(words))
            elif kind < 0.7:
                parts.append(shuffle.choice(characters))
            elif kind < 0.9:
                parts.append(" " * shuffle.choice((1, 1, 1, 2, 3)))
            else:
                parts.append(shuffle.choice(("\n", "\r\n", "\t", "\n\n", "7", "'s", "1234")))
        texts.append("".join(parts))
    return texts
