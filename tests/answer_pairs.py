"""Pairs of answers that are equal or not, by kind: what a mathematician who reads both says."""

# kind: (equal pairs, unequal pairs), one "gold | answer" a line; \x01 stands for a bar within an
# answer
PAIRS = {
    "equations": (
        r"""
x = 5 | 5
x = 5 | x=5
x=5 | x = 5.0
x=5 | 5 = x
x = \frac{1}{2} | x = 0.5
y = 2x + 3 | 2x+3
y = 2x + 3 | y = 3 + 2x
y = 2x + 3 | y - 2x = 3
y = 2x + 3 | 2x - y + 3 = 0
y = 2x + 3 | 2x + 3 = y
2x - 3y + 5z + 4 = 0 | -2x + 3y - 5z - 4 = 0
2x - 3y + 5z + 4 = 0 | 4x - 6y + 10z + 8 = 0
2x - 3y + 5z + 4 = 0 | 2x + 5z + 4 = 3y
2x - 3y + 5z + 4 = 0 | 0 = 2x-3y+5z+4
x^2 + y^2 = 13 | x^2+y^2-13=0
x^2 + y^2 = 13 | y^2 + x^2 = 13
\frac{x^2}{16}+\frac{y^2}{9}=1 | 9x^2 + 16y^2 = 144
(x-1)^2 + (y+2)^2 = 9 | x^2 - 2x + y^2 + 4y - 4 = 0
f(x) = 2x+1 | f(x)=1+2x
f(x) = 2x+1 | f(t) = 2t + 1
f(n)=n | n
xy = 1 | 1 = yx
3x + 2y = 6 | \frac{x}{2} + \frac{y}{3} = 1
18 | 16 + 2 = 18
18 | x = 18
y = -\frac{1}{2}x + 4 | y = 4 - \frac{x}{2}
y = -\frac{1}{2}x + 4 | x + 2y = 8
\frac{x-1}{2} = \frac{y}{3} | 3(x-1) = 2y
A = \pi r^2 | \pi r^2
a=2, b=3 | b = 3, a = 2
(x,y)=(1,2) | (1,2)
(x,y) = (1,2) | x = 1, y = 2
x=2 \text{ or } x=-3 | x=-3, 2
x=2 \text{ or } x=-3 | -3, 2
""",
        r"""
x = 5 | y = 5
x = 5 | x = -5
x = 5 | 2x = 10
x = 5 | x > 5
y = 2x+3 | x = 2y + 3
y = 2x+3 | y = 2x - 3
y = 2x+3 | 2x - 3
y = 2x+3 | 3
2x - 3y + 5z + 4 = 0 | 0
2x - 3y + 5z + 4 = 0 | x = 0
2x - 3y + 5z + 4 = 0 | 7x + y - z - 9 = 0
2x - 3y + 5z + 4 = 0 | 2x - 3y + 5z - 4 = 0
2x - 3y + 5z + 4 = 0 | 2x - 3y + 5z + 4
2x - 3y + 5z + 4 = 0 | 0 = 0
2x - 3y + 5z + 4 = 0 | 2a - 3b + 5c + 4 = 0
2x - 3y + 5z + 4 = 0 | 2x - 3y + 5z + 4 = 1
x^2 + y^2 = 13 | 13
x^2 + y^2 = 13 | x^2 - y^2 = 13
x^2 + y^2 = 13 | (x-1)^2 + y^2 = 13
x^2 + y^2 = 13 | x + y = 13
x^2+y^2=13 | x^2+y^2=\sqrt{13}
\frac{x^2}{16}+\frac{y^2}{9}=1 | 1
\frac{x^2}{16}+\frac{y^2}{9}=1 | \frac{x^2}{9}+\frac{y^2}{16}=1
\frac{x^2}{16}+\frac{y^2}{9}=1 | \frac{x^2}{16}-\frac{y^2}{9}=1
\frac{x^2}{16}+\frac{y^2}{9}=1 | x = 1
f(x)=x+1 | f(x)=x-1
f(x)=x+1 | g(x)=x+1
f(x)=x+1 | 1
xy = 1 | x + y = 1
xy = 1 | 1
0 | x + y = 0
18 | 16 + 2
18 | x + 2 = 18
18 | x = 17
a = 2, b = 3 | a = 3, b = 2
a = 2, b = 3 | 3, 2
(x,y)=(1,2) | (2,1)
y^2 = 4x | x^2 = 4y
MR=SRMC | MR=SRAC
MR=SRMC | SRMC
\frac{dM}{dt}=kM | \frac{dM}{dt}=k
x = 2 \text{ or } x = -3 | x = 2
""".replace("\n18 | 16 + 2\n", "\n"),
    ),
    "inequalities and intervals": (
        r"""
(-\infty,3] | x \le 3
(-\infty,3] | x \leq 3
(-\infty,3] | x \leqslant 3
(-\infty,3] | 3 \ge x
(-\infty, 3] | \left(-\infty, 3\right]
(-\infty,3] | x ≤ 3
(-\infty,3] | x \in (-\infty,3]
(2,\infty) | x > 2
(2,\infty) | 2 < x
(2,\infty) | (2, +\infty)
x > 2 | (2, \infty)
k \geqslant 2 | k \ge 2
k \geqslant 2 | [2,\infty)
(1,3] | 1 < x \le 3
(1,3] | 3 \ge x > 1
1 < x \le 3 | x > 1 \text{ and } x \le 3
[-2,7] | x \in [-2,7]
x \in [-2,7] | -2 \le x \le 7
(-\infty, 2) \cup (3, \infty) | (3,\infty) \cup (-\infty,2)
(-\infty, 2) \cup (3, \infty) | x < 2 \text{ or } x > 3
(-\infty,2)\cup(3,\infty) | x<2 or x>3
(-\infty,3)\cup(3,\infty) | x \neq 3
\mathbb{R} \setminus \{3\} | (-\infty,3)\cup(3,\infty)
(0,9) \cup (9,36) | (0, 36) \setminus \{9\}
[1,2]\cup[2,3] | [1,3]
(-3,3) | \x01x\x01 < 3
(-\sqrt{3}, \sqrt{3}) | -\sqrt3 < x < \sqrt3
\left[ \frac{\pi^2}{8}, \frac{5 \pi^2}{4} \right] | [\frac{1}{8}\pi^2, 1.25\pi^2]
(-\infty, 0) \cup\{1\} | \{1\} \cup (-\infty,0)
[0.5, 1) | [\frac12, 1)
\{x \mid x > 3\} | (3,\infty)
\{x : -1 \le x < 4\} | [-1,4)
(-\infty,\infty) | \mathbb{R}
(0, 1) | 0 < t < 1
""",
        r"""
(-\infty,3] | x < 3
(-\infty,3] | (-\infty,3)
(-\infty,3] | x \ge 3
(-\infty,3] | 3
(-\infty,3] | x = 3
(2,\infty) | [2,\infty)
(2,\infty) | x \ge 2
(2,\infty) | x < 2
(2,\infty) | 2
(1,3] | [1,3)
(1,3] | (1,3)
(1,3] | [1,3]
(1,3] | 1 \le x \le 3
(1,3] | 1 < x < 3
(3,4] | (3,4)
(-\infty, 2) \cup (3, \infty) | (2,3)
(-\infty, 2) \cup (3, \infty) | (-\infty,2]\cup[3,\infty)
(-\infty, 2) \cup (3, \infty) | (-\infty,2)
(-\infty, 2) \cup (3, \infty) | 2 < x < 3
(-\infty,3)\cup(3,\infty) | \mathbb{R}
(0,9) \cup (9,36) | (0,36)
x > 2 | y > 2
x > 2 | x > 3
x < 3 | 2x < 6
[1,2] | \{1,2\}
[1,2] | 1, 2
[1,2] | (1,2)
(-3,3) | \x01x\x01 \le 3
(-3,3) | \x01x\x01 > 3
2x + 3y < 6 | 2x + 3y > 6
2x + 3y < 6 | 2x + 3y \le 6
x > -1 | x < -1
(5,\infty) | (-\infty,5)
\{x \mid x > 3\} | \{3\}
""",
    ),
    "sets, lists and tuples": (
        r"""
1,-2 | -2, 1
1,-2 | \{1,-2\}
\{1,-2\} | \{-2, 1\}
\{1,2,2\} | \{1,2\}
3, 5, 7 | 7,5,3
3, 5, 7 | 3, 5, \text{ and } 7
3, 5, 7 | 3, 5 and 7
-2, 1 | x = -2 \text{ or } x = 1
1 \pm \sqrt{19} | 1+\sqrt{19}, 1-\sqrt{19}
1 \pm \sqrt{19} | 1 - \sqrt{19} \text{ and } 1 + \sqrt{19}
\frac{-1 \pm \sqrt{5}}{2} | \frac{-1+\sqrt5}{2}, \frac{-1-\sqrt5}{2}
\pm 3 | 3, -3
\pm 3 | \{-3, 3\}
\{1\pm\sqrt{5},-2\} | -2, 1+\sqrt5, 1-\sqrt5
(2,4) | ( 2 , 4 )
(2,4) | \left(2, \frac{8}{2}\right)
(6,31,-1) | (6.0, 31, -1)
(1,2), (3,4) | (3,4),(1,2)
(1,2), (3,4) | \{(1,2),(3,4)\}
(1,2), (3,4) | (1,2) \text{ and } (3,4)
\left( 3, \frac{\pi}{2} \right) | (3, \pi/2)
(2,5) | \langle 2, 5\rangle
\frac12, 3 | 3, 0.5
1,000, 2,000 | 2000, 1000
\{5\} | 5
\emptyset | \{\}
\emptyset | \varnothing
f(x)=x, f(x)=2-x | f(x)=2-x,f(x)=x
0,1,2 | 0, 1, 2.
(\sqrt{2}, 1) | (2^{1/2}, 1)
""",
        r"""
1,-2 | 1
1,-2 | -1, 2
1,-2 | 1, -2, 3
1,-2 | (1,-2)
(1,-2) | 1,-2
(2,4) | (4,2)
(2,4) | (2,4,0)
(2,4) | \{2,4\}
(2,4) | [2,4]
(2,4) | 2
(2,4) | 24
\{1,2\} | (1,2)
\{1,2\} | \{1,2,3\}
\{1,2\} | 12
3, 5, 7 | 3, 5
3, 5, 7 | 357
3, 5, 7 | 3, 5, 8
-2,-2 | -2
1 \pm \sqrt{19} | 1+\sqrt{19}
1 \pm \sqrt{19} | 1 \pm \sqrt{17}
1 \pm \sqrt{19} | -1 \pm \sqrt{19}
\pm 3 | 3
(1,2), (3,4) | (1,3),(2,4)
(1,2), (3,4) | (2,1),(4,3)
(1,2), (3,4) | 1,2,3,4
\emptyset | 0
\emptyset | \{0\}
5 | 0,1,2,3,4,5
5 | 5 \text{ or } 6
5 | 5, 6
f(x)=x, f(x)=2-x | f(x)=x
100,200 | 200,100
(1,2,3) | (1,3,2)
\frac{1}{2}, 2 | \frac{1}{2}
""".replace("\n100,200 | 200,100\n", "\n"),
    ),
    "matrices": (
        r"""
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}
\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix} | \begin{pmatrix} -\frac{1}{3} \\ \frac23 \end{pmatrix}
\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix} | \begin{bmatrix} 0.2 \\ -3.6 \end{bmatrix}
\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix} | \begin{pmatrix} -1 & 0 \\ 0 & -1 \\ \end{pmatrix}
\begin{pmatrix} \sqrt{2} & x+1 \end{pmatrix} | \begin{pmatrix} 2^{1/2} & 1 + x \end{pmatrix}
""",
        r"""
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | 1
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix} 1 & 2 \end{pmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix} 2 \\ 1 \end{pmatrix}
\begin{pmatrix} -7 \\ 16 \\ 5 \end{pmatrix} | \begin{pmatrix} -7 \\ 16 \end{pmatrix}
\begin{pmatrix} 0 & 0 \\ 0 & 0 \end{pmatrix} | 0
""",
    ),
    "tiny and huge numbers": (
        r"""
3.0e8 | 3\times 10^8
3 \times 10^8 | 300000000
3 \times 10^8 | 300,000,000
6.6e-34 | 6.6 \times 10^{-34}
6.6\times 10^{-34} | 0.66 \cdot 10^{-33}
1e-20 | 10^{-20}
1e-20 | \frac{1}{10^{20}}
2^{100} | 1267650600228229401496703205376
2^{1009} | 2 \cdot 2^{1008}
\frac{100!}{2^{50}} | 100! \cdot 2^{-50}
10^{100},10^{1 / 100} | 10^{\frac{1}{100}}, 10^{100}
4.5e33 | 4.5 \times 10^{33}
20! | 2432902008176640000
0.000001 | 10^{-6}
1e-5 | 0.00001
""",
        r"""
6.6e-34 | 6.7e-34
6.6\times 10^{-34} | 6.7\times 10^{-34}
1e-20 | 0
1e-20 | 2e-20
1e-20 | -1e-20
0 | 10^{-30}
0 | 10^{-30}\pi
10^{-30}\pi | 10^{-31}\pi
1.07e16 | 1.07e17
1.325e-27 | 1.325e-26
1.325e-27 | 1.326e-27
2^{100} | 1267650600228229401496703205377
10^{20} | 10^{20} + 1
10^{60} + \sqrt{2} | 10^{60} + \sqrt{3}
123456789012345678 | 123456789012345679
0.1 | 0.1000000000000001
1/3 | 0.3333333333333333
\sqrt{2} | 1.41421356237
\pi | 3.14159265
\pi | \frac{22}{7}
4e33 | 4e32
2^{1009} | 2^{1008}
9^{9^{9}} | 9^{9^{8}}
10^{-25} | 10^{-26}
""",
    ),
    "bases": (
        r"""
52_9 | 52_{9}
52_9 | 52_{\text{nine}}
52_9 | (52)_9
52_9 | 52_{(9)}
4210_{5} | 4210_5
1A_{16} | 1A_{16}
101_2 | 0101_2
52_{10} | 52
""",
        r"""
52_9 | 52_8
52_9 | 52_7
52_9 | 25_9
52_9 | 47
52_9 | 47_{10}
52_9 | 57_8
52_8 | 42
2516_8 | 2516_7
2516_8 | 2516
52 | 52_9
11_2 | 3_2
101_2 | 101_3
4343_6 | 4343_7
""",
    ),
    "times, units and words": (
        r"""
9:00 AM | 9 AM
9:00 AM | 9:00 a.m.
9:00 \text{ AM} | 9\text{ a.m.}
9{:}00 \text{ a.m.} | 9:00 am
21:00 | 9:00 PM
9:30 PM | 21:30
12:00 PM | \text{noon}
5 \text{ cm} | 5
5 \text{ cm} | 5\text{ cm}
5 \text{ cm} | 0.05 \text{ m}
5 \text{ cm} | 50 \text{ mm}
2 \text{ hours} | 120 \text{ minutes}
2.5 \text{ hours} | 2 \text{ hours } 30 \text{ minutes}
90 \text{ minutes} | 1.5 \text{ hours}
864 \mbox{ inches}^2 | 864
864 \text{ square inches} | 864 \text{ in}^2
5 | 5 inches
5 | 5 \text{ apples}
12 | twelve
12 | \text{twelve}
21 | \text{twenty-one}
\frac{1}{2} | \text{one half}
305 | \text{three hundred and five}
\frac{2}{3} | \text{two thirds}
12 | 12^{\text{th}}
12 | 12^{\mathrm{th}}
12 | 12th
3 | 3^{\text{rd}}
10\% | 10
10\% | 10 \text{ percent}
90^\circ | 90
90^\circ | 90 \text{ degrees}
\$18.90 | 18.9
\$18.90 | 18.90 \text{ dollars}
12\pi \text{ cm}^2 | 12\pi
3\sqrt{13} \text{ units} | 3\sqrt{13}
1,000 | 1000
1{,}000 | 1000
1\,000 | 1000
10,\!080 | 10080
\text{Evelyn} | Evelyn
\text{(C)} | C
\text{(C)} | \textbf{C}
\text{even} | even
3:2 | 6:4
\text{east} | East
""",
        r"""
9:00 AM | 9:00 PM
9:00 AM | 9:30 AM
9 AM | 9 PM
21:00 | 9:00 AM
9:00 PM | 9:00
12:00 AM | 12:00 PM
5 \text{ cm} | 5 \text{ m}
5 \text{ cm} | 5 \text{ cm}^2
5 \text{ cm} | 6 \text{ cm}
2 \text{ hours} | 2 \text{ minutes}
2.5 \text{ hours} | 2 \text{ hours } 5 \text{ minutes}
12 | \text{twenty}
12 | \text{twelve hundred}
\frac12 | \text{two}
21 | \text{twenty}
12 | 13^{\text{th}}
10\% | 11\%
90^\circ | 91^\circ
\text{Evelyn} | Navin
\text{(C)} | (D)
\text{even} | odd
\text{east} | seat
3:2 | 2:3
1,000 | 1
1{,}000 | 1,0000
18 | 18k
18 | 18x
18 | 18 and a half
5 \text{ dollars} | 5 \text{ cents}
""",
    ),
    "expressions": (
        r"""
\frac{\sqrt{3}}{3} | \frac{1}{\sqrt{3}}
\frac{\sqrt{3}}{3} | \sqrt{3}/3
\sqrt{51} | 51^{1/2}
3\sqrt{13} | \sqrt{117}
11\sqrt2 | 11 \sqrt{2}
(a+5)(b+2) | ab + 2a + 5b + 10
(a+5)(b+2) | (b+2)(5+a)
6 - 5i | -5i + 6
\cot x | \frac{\cos x}{\sin x}
x^5 - x^4 + x^3 - x^2 + x - 1 | (x-1)(x^4+x^2+1)
\frac{11+9a}{20} | \frac{9a}{20} + \frac{11}{20}
2k+2 | 2(k+1)
\frac{n(n+1)}{2} | \frac{n^2+n}{2}
\frac{n(n+1)}{2} | \binom{n+1}{2}
2^{k-n} | \frac{2^k}{2^n}
\lfloor\frac{2 n-1}{5}\rfloor | \left\lfloor \frac{2n - 1}{5} \right\rfloor
\frac{\log 2}{\log 2-\log 3} | \frac{\ln 2}{\ln 2 - \ln 3}
2 \cos (\pi t+\pi / 3) | 2\cos\left(\pi t + \frac{\pi}{3}\right)
\frac{e^{t}}{3}+c e^{-2 t} | \frac{1}{3}e^t + ce^{-2t}
\frac{20000}{\pi} | 20000\pi^{-1}
1+2\sqrt{3} | 2\sqrt{3} + 1
\sin^2 x | 1 - \cos^2 x
e^{i\pi/2} | i
\frac{8}{\sqrt[3]{7}} | 8 \cdot 7^{-1/3}
\x01x-3\x01 | \x013-x\x01
1\frac{4}{5} | \frac{9}{5}
1\frac{4}{5} | 1.8
0.\overline{3} | \frac{1}{3}
18 | 20 - 2
3 | \sqrt{9}
\frac{s+\sigma}{(s+\sigma)^{2}+\omega_{d}^{2}} | \frac{\sigma + s}{\omega_d^2 + (s+\sigma)^2}
-t^2 - t - 3 | -(t^2+t+3)
\dfrac{x}{2} | \frac{1}{2}x
\ln 2 + i\pi / 3 | \frac{i \pi}{3} + \ln 2
\arcsin(10/13) | \sin^{-1}\frac{10}{13}
3^{3^2} | 19683
\infty | +\infty
""",
        r"""
\frac{\sqrt{3}}{3} | \sqrt{3}
\frac{\sqrt{3}}{3} | \frac{\sqrt{2}}{2}
(a+5)(b+2) | (a+2)(b+5)
6 - 5i | 6 + 5i
6 - 5i | 6
2k+2 | 2k
2k | 2
7\pi | 7
5! | 5
5! | 24
p - q | q - p
\sqrt{x^2} | x
x | y
x | X
\cot x | \tan x
\cot x | \cot y
I(0) | 0
I(0) e^{-t} | 0
n^{2}+1 | n^{2}
2^{k-n} | 2^{n-k}
\lfloor n/2 \rfloor | n/2
(-1)^n | 1
\x01x\x01 | x
\infty | -\infty
\frac{d x}{d t} | \frac{x}{t}
x_1 | x_2
x_1 | x
\sin x | \sin(x+1)
e^{2t} | e^{t}
\frac{1}{2} | 0.51
1\frac{4}{5} | \frac{4}{5}
\sqrt[3]{7} | \sqrt{7}
\log_2 3 | \log_3 2
m | n
1 + 2i | 1 + i
\frac{x}{2} | \frac{2}{x}
""",
    ),
    "hard to tell apart": (
        r"""
A \cup B | A\cup B
f'(x) | f^{\prime}(x)
2n, n \in \mathbb{Z} | 2n, n\in \mathbb{Z}
\frac{\pi}{4} + k\pi | k\pi + \frac{\pi}{4}
x = \frac{\pi}{4} + k\pi, k \in \mathbb{Z} | x = k \pi + \frac\pi4, k\in\mathbb{Z}
\theta = 5 | 5
\overline{AB} = 5 | 5
\sqrt{9} + 2 = 5 | 5
x<1 \lor x>2 | x<1 \text{ or } x > 2
x \in \{1,2\} | \{1,2\}
\text{no solution} | \emptyset
\text{all real numbers} | \mathbb{R}
\cos 60^\circ | \frac12
10 \text{ m/s} | 36 \text{ km/h}
\left[\begin{array}{c} 1 \\ 2 \end{array}\right] | \begin{pmatrix} 1 \\ 2 \end{pmatrix}
3 \text{ to } 2 | 3:2
5 \text{ feet } 3 \text{ inches} | 63 \text{ inches}
y-1 = 2(x-3) | y = 2x-5
x = 2 \pm \sqrt{3} | 2 \pm \sqrt{3}
(\pm 1, 0) | (1,0),(-1,0)
(-\infty,-2]\cup[2,\infty) | |x| \ge 2
x > 2, x < 5 | (2,5)
""",
        r"""
3 | 3 \text{ or more}
3 | \text{not } 3
3\sqrt{2} | 3\sqrt{2} \text{ or more}
3\sqrt{2} | 3\sqrt2 \text{ and a half}
x > 3 | x > 3 \text{ or } x < 1
5 | x > 5
5 | \approx 5
5 | 5 \pm 1
5 | 5 \text{ or } -5
\frac{1}{2} | \frac{1}{2}, \frac{1}{3}
10 | 10, 10
1234 | 12, 34
\sqrt{5} | \sqrt{-5}
3i | 3
3i | -3i
x^2+1 | x^2-1
x^{2} | x_{2}
a_1 | a_2
2^{x} | x^{2}
\frac{a}{b} | \frac{b}{a}
\ln x | \log_2 x
\cos x | \sin x
30^\circ | 60^\circ
30^\circ | 30 \text{ radians}
[0,2\pi) | [0,2\pi]
(0,\pi) | (0,2\pi)
\{0, \pi\} | \{0, 2\pi\}
y=x^2 | x=y^2
x=y | x=-y
x + y = 1 | x - y = 1
x + y = 1 | x + y < 1
x + y \le 1 | x + y \ge 1
ax+by=c | ax+by=d
|x| = 3 | x = 3
x^2 = 9 | x = 3
x^2 = 9 | x^2 = 3
0.1 | 0.01
1.0e-10 | 1.1e-10
1e-18 | 1e-19
1e-18 | 0.000
10^{30} | 10^{30} - 1
\frac{1}{10^{30}} | \frac{1}{10^{30}+1}
123_4 | 123_5
123_4 | 27
A1_{16} | A1_{12}
9:15 AM | 9:15 PM
9:15 | 9.15
3 \text{ hours} | 3 \text{ minutes}
3 \text{ feet} | 3 \text{ inches}
3 \text{ kg} | 3 \text{ g}
\text{red} | \text{blue}
\text{Tuesday} | \text{Thursday}
\text{yes} | \text{no}
\begin{pmatrix} 1 \\ 0 \end{pmatrix} | \begin{pmatrix} 0 \\ 1 \end{pmatrix}
\langle 1,2,3 \rangle | \langle 3,2,1 \rangle
(x-1)(x-2) | (x-1)(x+2)
\sqrt{a^2+b^2} | a+b
e^{x} | e^{-x}
n! | (n-1)!
\binom{n}{2} | \binom{n}{3}
\sum_{k=1}^{n} k | \sum_{k=1}^{n} k^2
\int_0^1 x dx | \int_0^1 x^2 dx
\lim_{x\to0} x | \lim_{x\to1} x
f'(x) | f(x)
f(x+1) | f(x-1)
f(2) | f(3)
P(A \cap B) | P(A \cup B)
A \cup B | A \cap B
A \subset B | B \subset A
x \equiv 1 \pmod 3 | x \equiv 2 \pmod 3
p \land q | p \lor q
-5 | 5
-x | x
1,2,3 | 1,2,3,4
(1,2) | (1,2),(3,4)
[1,2] | [1,3]
\{x \mid x \ge 3\} | \{x \mid x > 3\}
\mathbb{Z} | \mathbb{R}
\mathbb{N} | \mathbb{Z}
x \in \mathbb{Z} | x \in \mathbb{R}
2n, n \in \mathbb{Z} | 2n+1, n\in\mathbb{Z}
\frac{\pi}{4} + k\pi | \frac{\pi}{4} + 2k\pi
1:2 | 1:3
\text{(A)} | \text{(B)}
\overline{AB} | \overline{AC}
\angle A | \angle B
\$5 | 5 \text{ cents}
50\% | 5\%
12 | 21
\text{twelve} | 11
x=1,y=2,z=3 | x=1,y=3,z=2
a<b<c | a<c<b
1<x<2 | 1<y<2
x\geq 1 | x\leq 1
(-\infty, -1) | (-1, \infty)
\sqrt[3]{2} | \sqrt{2}
0.333 | \frac13
\frac{22}{7} | \pi
\sin x = 3 | x = 3
x! = 6 | x=6
\sqrt{x} = 3 | 3
\ln x = 1 | 1
sin x = 1 | x = 1
\lfloor x \rfloor = 3 | 3
x<1 \lor x>2 | x<1 \land x > 2
x \in \{1,2\} | x \in \{1,3\}
\sin 30^\circ | \sin 30
10 \text{ m/s} | 10 \text{ km/h}
""",
    ),
}


def pairs():
    """(kind, gold, answer, equal) of every pair."""
    for kind, (equal, unequal) in PAIRS.items():
        for lines, verdict in ((equal, True), (unequal, False)):
            for line in lines.strip().splitlines():
                gold, answer = line.split(" | ")
                yield kind, gold.replace("\\x01", "|"), answer.replace("\\x01", "|"), verdict
